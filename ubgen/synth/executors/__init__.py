"""Who makes the shards: processes of this machine, a part of a job array, or a Ray cluster. The dataset is the same."""
