//! The model is what the other tests believe, so it has tests of its own.

use super::{Effect, Model, SECTOR, Tag};

fn content(tag: Tag, sector: usize) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR];
    tag.fill(sector, &mut bytes);
    bytes
}

#[test]
fn a_foreign_sector_is_noticed() {
    let mut model = Model::new(7, 8);
    let tag = Tag::new(7, 1);
    model.lay_down(0..8, tag);
    assert!(model.check_read(3, &content(tag, 3)).is_ok());
    assert!(model.check_read(3, &content(tag, 4)).is_err());
    assert!(model.check_read(3, &content(Tag::ZEROES, 3)).is_err());
    let mut torn = content(tag, 3);
    torn[SECTOR - 1] ^= 1;
    assert!(model.check_read(3, &torn).is_err());
}

#[test]
fn what_a_discard_left_is_pinned_when_seen() {
    let (old, zeroes) = (Tag::new(7, 1), Tag::ZEROES);
    for (seen, other) in [(old, zeroes), (zeroes, old)] {
        let mut model = Model::new(7, 1);
        model.lay_down(0..1, old);
        model.begin(0..1, Effect::PerhapsZeroes);
        model.finish(0..1);
        assert!(model.check_read(0, &content(seen, 0)).is_ok());
        assert!(model.check_read(0, &content(other, 0)).is_err());
    }
}

#[test]
fn a_flush_covers_what_was_answered_before_it() {
    let [first, second, third] = [1, 2, 3].map(|number| Tag::new(7, number));
    let write = |model: &mut Model, tag| {
        model.begin(0..1, Effect::Set(tag));
        model.finish(0..1);
    };
    let mut model = Model::new(7, 1);
    write(&mut model, first);
    let flush = model.begin_flush();
    write(&mut model, second);
    model.finish_flush(flush);
    model.begin(0..1, Effect::Set(third));
    for (tag, is_possible) in [(first, true), (second, true), (third, true), (Tag::ZEROES, false)] {
        let result = model.clone().check_after_crash(0, &content(tag, 0));
        assert_eq!(result.is_ok(), is_possible, "{tag:?}");
    }
}

#[test]
fn a_crash_settles_what_was_seen() {
    let (old, new) = (Tag::new(7, 1), Tag::new(7, 2));
    let mut model = Model::new(7, 1);
    model.lay_down(0..1, old);
    model.begin(0..1, Effect::Set(new));
    assert!(model.check_after_crash(0, &content(old, 0)).is_ok());
    assert!(model.check_read(0, &content(new, 0)).is_err());
    assert!(model.check_read(0, &content(old, 0)).is_ok());
}

#[test]
fn a_flush_between_two_discards_does_not_settle_what_only_the_second_has_done() {
    let (old, zeroes) = (Tag::new(7, 1), Tag::ZEROES);
    let mut model = Model::new(7, 1);
    model.begin(0..1, Effect::Set(old));
    model.finish(0..1);
    let discard = |model: &mut Model| {
        model.begin(0..1, Effect::PerhapsZeroes);
        model.finish(0..1);
    };
    discard(&mut model);
    let flush = model.begin_flush();
    discard(&mut model);
    assert!(model.check_read(0, &content(zeroes, 0)).is_ok());
    model.finish_flush(flush);
    assert!(model.check_read(0, &content(old, 0)).is_err());
    assert!(model.check_after_crash(0, &content(old, 0)).is_ok(), "the second was not flushed");
}
