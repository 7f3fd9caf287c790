//! Every scenario under many schedules. A failure prints its schedule, which `REPLAY=...` repeats.

use schedules::explore::explore;
use schedules::qcow2::{caching, claiming, flushing, freeing};
use schedules::tasks;

macro_rules! scenarios {
    ($($module:ident::$name:ident;)*) => {
        $(#[test]
        fn $name() {
            explore(stringify!($name), $module::$name);
        })*
    };
}

scenarios! {
    tasks::a_wake_is_never_lost;
    tasks::a_late_wake_finds_another_task;
    claiming::overlapping_claims_exclude_each_other;
    claiming::claims_are_granted_in_the_order_of_arrival;
    claiming::a_claim_given_up_lets_the_next_through;
    caching::a_look_at_a_slice_never_shows_another;
    caching::a_look_at_a_slice_shows_all_of_a_change_or_none;
    caching::a_look_between_changes_and_flushes_is_sound;
    caching::no_change_is_lost_between_cache_and_file;
    caching::one_load_serves_all_who_wait;
    freeing::a_cluster_is_freed_when_nobody_can_look_at_it;
    flushing::a_flush_covers_what_came_before_its_call;
    flushing::a_flush_given_up_lets_the_next_begin;
}
