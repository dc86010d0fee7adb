"""The fault suite: real servers break under load, and a checker judges every acknowledged write.

`nox -s faults`, or `python -m tests.faults` in the root, runs every scenario. `nox -s soak`, or
`python -m tests.faults.soak`, runs a load for a long time. test_faults.py runs short forms of the
scenarios and tests the checker. From the bottom up:

- `history` is the output of a load: one event for each call of a verb.
- `recording` is a storage that records these events and judges each call by itself.
- `workload` is the load: mixed verbs from several processes; `worker` is one of the processes.
- `checker` reads the history and reports contradictions and losses. It does no I/O.
- `run` puts servers, load and fault together; `scenarios` lists the faults.
- `report` keeps results as JSON and updates docs/reliability.md.
"""
