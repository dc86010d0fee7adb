"""The benchmarks behind the claims. `nox -s bench` or `python -m benchmarks` runs them.

- `workload` makes sessions; `drivers` connects clients; `ways` has the alternatives to GETEX;
  `peers` are other libraries; `browser` is a client of the applications in `web_apps`. Each `Way`
  connects a client and makes its operations.
- `client` runs operations in a process; `measure` interleaves and repeats the runs. `arrivals`
  signals random arrivals. `servers` starts servers. `micro` runs under pyperf.
- `scenarios` has the measurements, and `declared` their tables and plots, which `tables` and
  `plots` render from `results`.
"""
