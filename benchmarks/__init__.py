"""The benchmarks behind the claims.

`nox -s bench` or `python -m benchmarks` runs them. From the bottom up:

- `results` holds the figures of a run, as JSON; `machine` describes the computer.
- `relay` counts and delays the bytes between a client and a server; `servers` starts servers.
- `workload` makes sessions. `alternatives` are ways to load them, `clients` compares drivers with
  the storage, and `peers` are other libraries.
- `loops` runs an operation in a closed or an open loop; `arrivals` times the open loop, and
  `client_process` gives a client a process. `measure` interleaves and repeats the runs.
- `scenarios` has a module for each subcommand; `tables`, `plots` and `page` show its results.
"""
