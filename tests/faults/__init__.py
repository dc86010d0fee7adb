"""The fault suite: real servers break under load, and a checker knows every acknowledged write.

`nox -s faults`, or `python -m tests.faults` from the root, runs every scenario; `nox -s soak`, or
`python -m tests.faults.soak`, runs a load for long. tests/test_faults.py runs a short form, and
tests the checker. From the bottom up:

- `journal` is what a load leaves behind: one event for every verb that was used.
- `witness` is a storage that writes these events, and finds fault with errors on the spot.
- `workload` is the load: mixed verbs from several processes, each of which runs `worker`.
- `checker` reads the journals, and says what was wrong and what was lost. It does no I/O.
- `stage` puts servers, load and fault together; `scenarios` says what happens on it.
- `report` keeps results as JSON and brings docs/reliability.md up to date.
"""
