//! The structures of qcow2 images that several workers share.

#[path = "../../../src/qcow2/claims.rs"]
mod claims;
#[path = "../../../src/qcow2/epoch.rs"]
#[cfg_attr(not(test), expect(dead_code, reason = "the scenarios say how many lanes there are"))]
mod epoch;
#[path = "../../../src/qcow2/limbo.rs"]
#[expect(dead_code, reason = "the scenarios do not ask how much rests there")]
mod limbo;
#[path = "../../../src/qcow2/table.rs"]
#[expect(dead_code, reason = "the scenarios do not ask how much is dirty")]
mod table;

pub mod caching;
pub mod claiming;
pub mod flushing;
pub mod freeing;

mod refcount {
    /// A run of clusters, as far as the clusters at rest need it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(in crate::qcow2) struct Run {
        pub(in crate::qcow2) count: u64,
    }
}
