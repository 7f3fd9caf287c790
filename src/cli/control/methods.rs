//! The methods of the control socket.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use crate::blk::rates::RateLimits;
use crate::cli::control::report;
use crate::cli::control::rpc::{Failure, Parameters};
use crate::cli::size;
use crate::error::Error;
use crate::storage::files::Files;
use crate::storage::{Engine, block_on};
use crate::sync::Arc;
use crate::vhost::control::FrontEnds;

/// What is known of the disk beside its sessions.
pub(super) struct Disk<'a> {
    /// The image, as it was given on the command line.
    pub(super) path: PathBuf,
    pub(super) files: Arc<Files>,
    /// The control thread's way to the files.
    pub(super) engine: &'a dyn Engine,
    /// When the daemon began to serve.
    pub(super) since: Instant,
}

/// What a method may look at and change.
pub(super) struct Reach<'a, 'b> {
    pub(super) front_ends: &'a mut FrontEnds<'b>,
    pub(super) disk: &'a Disk<'a>,
}

type Answer = Result<Value, Failure>;

/// One method.
struct Method {
    name: &'static str,
    /// The names of its arguments; others are refused.
    parameters: &'static [&'static str],
    run: fn(&mut Reach<'_, '_>, &Parameters) -> Answer,
}

const METHODS: &[Method] = &[
    Method { name: "version", parameters: &[], run: version },
    Method { name: "info", parameters: &[], run: info },
    Method { name: "stats", parameters: &[], run: stats },
    Method { name: "inflight", parameters: &[], run: inflight },
    Method { name: "resize", parameters: &["size", "shrink"], run: resize },
    Method { name: "flush", parameters: &[], run: flush },
    Method { name: "qos", parameters: QOS, run: qos },
    Method { name: "shutdown", parameters: &[], run: shutdown },
];

/// The arguments of `qos`: a rate each, and one that takes all of them away.
const QOS: &[&str] = &[
    "bw_size",
    "bw_refill_time",
    "bw_one_time_burst",
    "ops_size",
    "ops_refill_time",
    "ops_one_time_burst",
    "off",
];

/// Carries out a method.
pub(super) fn run(reach: &mut Reach<'_, '_>, name: &str, parameters: &Parameters) -> Answer {
    let Some(method) = METHODS.iter().find(|method| method.name == name) else {
        let known: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
        return Err(Failure::unknown_method(name, &known.join(", ")));
    };
    let known = |name: &String| method.parameters.contains(&name.as_str());
    if let Some(unknown) = parameters.keys().find(|name| !known(name)) {
        let unknown: String = unknown.chars().take(64).collect();
        let takes = match method.parameters {
            [] => "takes no arguments".to_owned(),
            names => format!("takes {}", names.join(", ")),
        };
        return Err(Failure::parameters(format!("{name} has no argument {unknown:?}; it {takes}")));
    }
    (method.run)(reach, parameters)
}

/// An argument that says yes or no; no if it is not given.
fn flag(parameters: &Parameters, name: &str) -> Result<bool, Failure> {
    match parameters.get(name) {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(Failure::parameters(format!("{name} is true or false"))),
    }
}

/// An argument that is a number of bytes, or a text like 20G.
fn bytes(parameters: &Parameters, name: &str) -> Result<u64, Failure> {
    let wrong = |why: String| Failure::parameters(format!("{name}: {why}"));
    match parameters.get(name) {
        None => Err(wrong("it must be given, as bytes or like \"20G\"".to_owned())),
        Some(Value::Number(number)) => {
            number.as_u64().ok_or_else(|| wrong(format!("{number} is no number of bytes")))
        }
        Some(Value::String(text)) => size::parse(text).map_err(wrong),
        Some(_) => Err(wrong("it is a number of bytes or a text like \"20G\"".to_owned())),
    }
}

fn failed(error: &Error) -> Failure {
    Failure::failed(error.to_string().replace(['\n', '\r'], " "))
}

fn version(_: &mut Reach<'_, '_>, _: &Parameters) -> Answer {
    Ok(json!({ "name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION") }))
}

fn info(reach: &mut Reach<'_, '_>, _: &Parameters) -> Answer {
    let device = reach.front_ends.device();
    let mut info = report::image(device.image(), &reach.disk.path, &reach.disk.files);
    info["pid"] = std::process::id().into();
    info["queues"] = device.settings().queues.into();
    info["queue-size"] = device.settings().queue_size.into();
    info["block-size"] = device.settings().block_size.into();
    let front_ends = reach.front_ends.list();
    info["front-ends"] = front_ends.iter().map(report::front_end).collect();
    Ok(info)
}

fn stats(reach: &mut Reach<'_, '_>, _: &Parameters) -> Answer {
    let uptime = reach.disk.since.elapsed();
    Ok(report::stats(&reach.front_ends.report(), uptime))
}

fn inflight(reach: &mut Reach<'_, '_>, _: &Parameters) -> Answer {
    Ok(report::inflight(&reach.front_ends.report()))
}

fn resize(reach: &mut Reach<'_, '_>, parameters: &Parameters) -> Answer {
    let size = bytes(parameters, "size")?;
    let shrink = flag(parameters, "shrink")?;
    if !size.is_multiple_of(512) || size == 0 {
        return Err(Failure::parameters(format!("{size} bytes is no multiple of 512 above 0")));
    }
    let device = reach.front_ends.device();
    let old = device.image().size();
    if device.image().is_read_only() {
        let why = "the image is served read-only; serve it without --read-only to resize it";
        return Err(Failure::failed(why));
    }
    if size < old && !shrink {
        return Err(Failure::failed(format!(
            "the disk would shrink from {old} to {size} bytes and lose what lies behind; say \
             shrink=true once the guest uses no more than that"
        )));
    }
    // The image is changed by whoever has it alone.
    drop(device);
    refuse_outage(reach)?;
    let engine = reach.disk.engine;
    let change = reach.front_ends.change_image(|image| {
        block_on(engine, async {
            // What the guest was told is durable stays so, and errors of the past show here.
            image.flush(engine).await?;
            image.resize(engine, size, shrink).await
        })
    });
    let now = reach.front_ends.device().image().size();
    change.and_then(|done| done).map_err(|error| {
        let error = error.within(reach.disk.path.display());
        tracing::warn!("the disk has {now} bytes: {error}");
        failed(&error)
    })?;
    tracing::info!("the disk has {now} bytes now; it had {old}");
    Ok(json!({ "virtual-size": now, "was": old }))
}

/// Refuses what would wait, and front-ends with it, until the host has space again.
fn refuse_outage(reach: &Reach<'_, '_>) -> Result<(), Failure> {
    match reach.disk.files.outage().waiting() {
        0 => Ok(()),
        waiting => Err(Failure::failed(format!(
            "{waiting} operations wait for space on the host; free some and try again"
        ))),
    }
}

fn flush(reach: &mut Reach<'_, '_>, _: &Parameters) -> Answer {
    refuse_outage(reach)?;
    let device = reach.front_ends.device();
    let engine = reach.disk.engine;
    block_on(engine, device.image().flush(engine)).map_err(|error| failed(&error))?;
    Ok(json!({}))
}

fn qos(reach: &mut Reach<'_, '_>, parameters: &Parameters) -> Answer {
    let device = reach.front_ends.device();
    let limiter = device.limiter();
    let (old, off) = (limiter.get(), flag(parameters, "off")?);
    let mut text = String::new();
    for (name, value) in parameters.iter().filter(|(name, _)| *name != "off") {
        let value = match value {
            Value::String(text) => text.clone(),
            // Which texts are numbers is for the rates to say.
            other => other.to_string(),
        };
        text.push_str(&format!("{name}={} ", value.replace([',', ' '], "?")));
    }
    let changed = if off { RateLimits::default() } else { old }.with(&text);
    let rates = changed.map_err(|error| Failure::parameters(error.to_string()))?;
    if rates != old {
        limiter.set(rates).map_err(|error| failed(&error))?;
        tracing::info!("rate limits are {rates} now; they were {old}");
    }
    let fields = rates.fields().map(|(name, value)| (name.to_owned(), Value::from(value)));
    Ok(Value::Object(fields.into_iter().collect()))
}

fn shutdown(reach: &mut Reach<'_, '_>, _: &Parameters) -> Answer {
    tracing::info!("told to end on the control socket");
    reach.front_ends.end();
    Ok(json!({}))
}
