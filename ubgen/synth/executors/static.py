"""One part of a run, for job arrays that share nothing but the directory they write to."""

from collections.abc import Sequence

from ubgen.synth.accounts import Account
from ubgen.synth.executors.job import Events, Job
from ubgen.synth.executors.local import run_local


def part_of(shards: Sequence[int], part: int, parts: int) -> list[int]:
    """Every `parts`-th shard of the whole run, so that parts are equal whatever is finished already."""
    return [shard for shard in shards if shard % parts == part]


def run_static(job: Job, shards: Sequence[int], events: Events) -> Account:
    """Make the unfinished `shards` of this part, on all devices that the job sees."""
    part, parts = job.config.static_part()
    return run_local(job, part_of(shards, part, parts), events)
