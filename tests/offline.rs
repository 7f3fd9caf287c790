//! Snapshots and sizes of images that nothing else uses: contents, what `qemu-img` says of the
//! results and we of its, what is refused, random histories, and power cuts at every moment.

#[path = "offline/cuts.rs"]
mod cuts;
#[path = "offline/disk.rs"]
mod disk;
#[path = "offline/edits.rs"]
mod edits;
#[path = "offline/faults.rs"]
mod faults;
#[path = "offline/headers.rs"]
mod headers;
#[path = "offline/hostile.rs"]
mod hostile;
#[path = "offline/live.rs"]
mod live;
#[path = "offline/model.rs"]
mod model;
#[path = "offline/ordering.rs"]
mod ordering;
#[path = "offline/qemu.rs"]
mod qemu;
#[path = "offline/refusals.rs"]
mod refusals;
#[path = "offline/state.rs"]
mod state;
