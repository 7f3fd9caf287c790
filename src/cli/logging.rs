//! Log lines on standard error.

use std::io::IsTerminal;

use tracing_subscriber::filter::EnvFilter;

/// What is said while nothing is served yet: a refusal shall be the only line.
const BEFORE: &str = "warn";
/// What is said about a disk that is served.
const SERVING: &str = "info";
/// Guests can make this crate say things, as often as they like.
const NEVER: &str = "virtio_queue=off";

/// Changes how much is logged.
pub struct Logging {
    raise: Option<Box<dyn FnOnce()>>,
}

impl std::fmt::Debug for Logging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Logging")
    }
}

fn filter(level: &str) -> EnvFilter {
    EnvFilter::try_new(format!("{NEVER},{level}")).unwrap_or_else(|_| EnvFilter::new(BEFORE))
}

impl Logging {
    /// Sends log lines to standard error. `RUST_LOG` says which, then `level`; without both, lines
    /// about a disk that is served.
    pub fn start(level: Option<&str>) -> Self {
        let chosen = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
        let chosen = chosen.as_deref().or(level);
        let builder = tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_env_filter(filter(chosen.unwrap_or(BEFORE)))
            .with_filter_reloading();
        let handle = builder.reload_handle();
        builder.init();
        let raise = move || {
            // The subscriber lives as long as the process.
            let _ = handle.reload(filter(SERVING));
        };
        Self { raise: chosen.is_none().then(|| Box::new(raise) as Box<dyn FnOnce()>) }
    }

    /// Says that the disk is served from now on.
    pub fn serving(self) {
        if let Some(raise) = self.raise {
            raise();
        }
    }
}
