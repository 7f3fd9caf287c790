//! What methods tell, as JSON. Keys that qemu-img has too are named as there.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::blk::stats::{BUCKETS, FIRST_BOUND_NS, Kind, Totals};
use crate::image::describe::LayerInfo;
use crate::image::{Format, Image};
use crate::storage::files::Files;
use crate::vhost::control::FrontEnd;
use crate::worker::{QueueReport, Report};

/// The image and what it is made of.
pub(super) fn image(image: &Image, path: &Path, files: &Files) -> Value {
    let mut layers: Vec<Value> = image.layers().map(|layer| describe(layer, files)).collect();
    let mut top = layers.remove(0);
    // What the operator has called it, and what the guest sees.
    top["filename"] = path.display().to_string().into();
    top["virtual-size"] = image.size().into();
    top["read-only"] = image.is_read_only().into();
    top["backing-chain"] = layers.into();
    top
}

fn describe(layer: LayerInfo, files: &Files) -> Value {
    let format = match layer.format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    let mut value = json!({
        "filename": files.name(layer.file),
        "format": format,
        "virtual-size": layer.size,
    });
    if let Some(data) = layer.data_file {
        value["data-file"] = files.name(data).into();
    }
    if let Some(qcow2) = layer.qcow2 {
        value["cluster-size"] = qcow2.cluster_size.into();
        // As qemu-img names the versions of the format.
        value["compat"] = if qcow2.version < 3 { "0.10" } else { "1.1" }.into();
        value["snapshots"] = qcow2.snapshots.into();
    }
    value
}

/// A front-end that is connected.
pub(super) fn front_end(front_end: &FrontEnd) -> Value {
    json!({
        "number": front_end.number,
        "features": format!("{:#x}", front_end.features),
        "protocol-features": format!("{:#x}", front_end.protocol_features),
        "queues-enabled": front_end.enabled,
        "queues-served": front_end.served,
        "hears-of-resizes": front_end.can_be_told,
    })
}

fn counters(totals: &Totals, in_flight: usize) -> Value {
    let name = |kind: &Kind| match kind {
        Kind::Read => "read",
        Kind::Write => "write",
        Kind::Flush => "flush",
        Kind::Erase => "erase",
    };
    let latency: Map<String, Value> = Kind::ALL
        .iter()
        .zip(&totals.latency)
        .map(|(kind, buckets)| (name(kind).to_owned(), buckets.as_slice().into()))
        .collect();
    json!({
        "reads": totals.reads,
        "read-bytes": totals.read_bytes,
        "writes": totals.writes,
        "written-bytes": totals.written_bytes,
        "flushes": totals.flushes,
        "erases": totals.erases,
        "errors": totals.errors,
        "in-flight": in_flight,
        "latency": latency,
    })
}

/// What the workers have done, each and together.
pub(super) fn stats(workers: &[(usize, Report)], uptime: Duration) -> Value {
    let under_way =
        |report: &Report| -> usize { report.queues.iter().map(|queue| queue.under_way).sum() };
    let mut total = Totals::default();
    workers.iter().for_each(|(_, report)| total.add(&report.totals));
    let in_flight = workers.iter().map(|(_, report)| under_way(report)).sum();
    let worker = |(number, report): &(usize, Report)| {
        let mut value = counters(&report.totals, under_way(report));
        value["worker"] = (*number).into();
        value["queues"] = queues(report).into();
        value
    };
    // The last bucket has no bound.
    let bounds: Vec<u64> = (0..BUCKETS - 1).map(|n| (FIRST_BOUND_NS << n) / 1000).collect();
    json!({
        "uptime-seconds": uptime.as_secs(),
        "total": counters(&total, in_flight),
        "workers": workers.iter().map(worker).collect::<Vec<Value>>(),
        "latency-bounds-us": bounds,
    })
}

/// The queues of a worker by number.
fn queues(report: &Report) -> Vec<usize> {
    let mut queues: Vec<usize> = report.queues.iter().map(|queue| queue.index).collect();
    queues.sort_unstable();
    queues
}

/// The requests under way, by queue.
pub(super) fn inflight(workers: &[(usize, Report)]) -> Value {
    let mut queues: Vec<(usize, QueueReport)> = Vec::new();
    for (worker, report) in workers {
        queues.extend(report.queues.iter().map(|queue| (*worker, *queue)));
    }
    queues.sort_unstable_by_key(|(_, queue)| queue.index);
    let describe = |(worker, queue): &(usize, QueueReport)| {
        json!({
            "queue": queue.index,
            "worker": worker,
            "in-flight": queue.under_way,
            "oldest-us": queue.oldest_ns.map(|age| age / 1000),
        })
    };
    let total: usize = queues.iter().map(|(_, queue)| queue.under_way).sum();
    let queues: Vec<Value> = queues.iter().map(describe).collect();
    json!({ "in-flight": total, "queues": queues })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_the_sum_of_all_workers() {
        let queue = |index, under_way, oldest_ns| QueueReport { index, under_way, oldest_ns };
        let totals = Totals { reads: 3, read_bytes: 4096, ..Totals::default() };
        let first = Report { totals: totals.clone(), queues: vec![queue(2, 1, Some(5000))] };
        let queues = vec![queue(3, 2, Some(7000)), queue(1, 0, None)];
        let second = Report { totals, queues };
        let workers = [(0, first), (1, second)];
        let stats = stats(&workers, Duration::from_secs(9));
        assert_eq!(stats["total"]["reads"], json!(6));
        assert_eq!(stats["total"]["read-bytes"], json!(8192));
        assert_eq!(
            (&stats["total"]["in-flight"], &stats["uptime-seconds"]),
            (&json!(3), &json!(9))
        );
        assert_eq!(stats["workers"][1]["in-flight"], json!(2));
        assert_eq!(stats["workers"][1]["queues"], json!([1, 3]));
        let bounds = stats["latency-bounds-us"].as_array().expect("a list");
        assert_eq!((bounds.len(), &bounds[0], &bounds[18]), (19, &json!(16), &json!(16 << 18)));
        let buckets = stats["total"]["latency"]["read"].as_array().expect("a list");
        assert_eq!(buckets.len(), bounds.len() + 1);
        let inflight = inflight(&workers);
        assert_eq!(inflight["in-flight"], json!(3));
        assert_eq!(inflight["queues"][0]["oldest-us"], Value::Null);
        assert_eq!(
            inflight["queues"][1],
            json!({
                "queue": 2, "worker": 0, "in-flight": 1, "oldest-us": 5
            })
        );
    }
}
