//! R24: a file in use is cut only where nobody writes.

use common::workers::Mix;
use vhost_user_qcow2::storage::Purpose;
use vhost_user_qcow2::storage::mem::{Effect, Event};

use super::hold;

fn end(change: &Event) -> u64 {
    change.at + change.len
}

#[test]
fn r24_a_file_is_cut_behind_everything_that_is_written() {
    let mix = Mix { discard: 4, flush: 3, ..Mix::default() };
    let is_cut = |event: &Event| event.effect == Effect::Length && event.why == Purpose::Ahead;
    hold("r24", mix, |replay, event| {
        let mut others = replay.under_way();
        if is_cut(event) {
            assert!(replay.volatile.len() as u64 <= event.len, "{event:?} loses what was written");
            assert!(others.all(|other| end(other) <= event.len), "{event:?} comes too soon");
            return 1;
        }
        let cut = others.find(|other| is_cut(other));
        assert!(cut.is_none_or(|cut| end(event) <= cut.len), "{event:?} lies behind {cut:?}");
        0
    });
}
