"""The order of work: full batches across shards, retries first, leases that survive their workers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ubgen.core.classes import ClassList
from ubgen.synth.local import Leases
from ubgen.synth.plan import Item, Plan
from ubgen.synth.worker import Feed


def plan(classes: int, per_class: int, shard_size: int) -> Plan:
    names = tuple(f"c{i}" for i in range(classes))
    return Plan(ClassList(names, names), names, per_class, shard_size)


@settings(deadline=None)
@given(
    classes=st.integers(1, 7),
    per_class=st.integers(1, 7),
    shard_size=st.integers(1, 9),
    size=st.integers(1, 12),
    rejected=st.sets(st.tuples(st.integers(0, 48), st.integers(0, 3))),
)
def test_every_image_is_decided_and_only_the_end_is_part_empty(
    classes: int, per_class: int, shard_size: int, size: int, rejected: set[tuple[int, int]]
) -> None:
    """`rejected` are the draws (position, attempt) that are not good enough; each batch is decided before the next."""
    whole = plan(classes, per_class, shard_size)
    leases = Leases(range(whole.shards))
    feed = Feed(whole, lambda: leases.take("me"))
    done: dict[int, int] = {}
    sizes = []
    while batch := feed.next(size):
        sizes.append(len(batch))
        again = [i for i in batch if (i.position, i.attempt) in rejected]
        for item in batch:
            if item not in again:
                assert item.position not in done
                done[item.position] = item.attempt
        feed.decided(
            len(batch), [Item(i.position, i.class_index, i.image_index, i.attempt + 1) for i in again]
        )
    assert sorted(done) == list(range(whole.images))
    full = [n == size for n in sizes]
    fresh = -(-whole.images // size)  # batches that new images alone would fill
    assert all(full[: fresh - 1])


def test_a_part_empty_batch_waits_for_what_may_still_be_drawn_again() -> None:
    whole = plan(3, 1, 3)
    leases = Leases([0])
    feed = Feed(whole, lambda: leases.take("me"))
    first = feed.next(2)
    looked = []

    def check() -> None:
        """Called while it waits: now the first batch is judged."""
        looked.append(len(looked))
        if len(looked) == 1:
            feed.decided(2, [first[1]])

    second = feed.next(2, check)
    assert [item.position for item in second] == [2, first[1].position]
    assert looked
    feed.decided(2, [])
    assert feed.next(2) == []


def test_retries_come_before_new_images() -> None:
    leases = Leases([0])
    feed = Feed(plan(6, 1, 6), lambda: leases.take("me"))
    first = feed.next(2)
    feed.decided(2, first)
    assert [item.position for item in feed.next(4)] == [0, 1, 2, 3]


def test_shards_of_a_dead_worker_are_handed_out_again_first() -> None:
    leases = Leases([3, 5, 7, 9])
    assert [leases.take("a"), leases.take("b"), leases.take("a")] == [3, 5, 7]
    leases.finish("a", 3)
    assert leases.release("a") == [7]
    assert leases.waiting == 2
    assert [leases.take("b"), leases.take("b"), leases.take("b")] == [7, 9, None]
    leases.finish("a", 7)  # a late word of one that was given up
    leases.finish("b", 5)
    assert leases.release("b") == [7, 9]
    assert leases.release("nobody") == []
