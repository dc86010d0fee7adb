"""The fault suite: servers fail under load, and a checker judges every acknowledged write.

`nox -s faults`, or `python -m tests.faults`, runs every scenario. `nox -s soak`, or
`python -m tests.faults.soak`, runs a load for a long time. The modules, in Jepsen's words:

- `history` holds one event for each call of a verb.
- `client` is a storage that records these events, and judges each call by itself.
- `workload` is the load of one client; `worker` is a process of several clients.
- `nemesis` breaks the servers. `scenarios` lists its faults, and the errors that they may cause.
- `run` puts servers, load and nemesis together.
- `checker` reads the history, and reports contradictions and losses. It does no I/O.
- `judge` is the part of `checker` that all kinds of sessions share, `owners` the one for lists and
  revocations.
- `simulation` runs schedules of calls and faults in virtual time. `schedules` draws them, and
  `virtual` is their event loop and server.
- `report` keeps results as JSON, and updates docs/reliability.md.
"""
