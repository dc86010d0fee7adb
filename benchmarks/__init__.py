"""The benchmarks behind the claims: `nox -s bench`, or `python -m benchmarks` from the root.

From the bottom up:

- `results` is what a run leaves behind, as JSON; `machine` says where it was measured.
- `relay` counts and delays what passes between a client and a server; `servers` starts those.
- `alternatives` are ways to load a session, `peers` other libraries; `workload` is what they load.
- `measure` runs them: interleaved, repeated, warmed up.
- `scenarios` has a module for each subcommand, and `tables`, `plots` and `page` show what it found.
"""
