"""The benchmarks behind the claims. `nox -s bench` or `python -m benchmarks` runs them.

- `workload` makes sessions; `drivers` connects clients; `ways` has the alternatives to GETEX;
  `peers` are other libraries.
- `loops` runs an operation; `client_process` gives a client a process; `measure` interleaves and
  repeats the runs. `servers` starts servers. `micro` runs under pyperf.
- `scenarios` has a module for each measurement, and `declared` its tables and plots, which `tables`
  and `plots` render from `results`.
"""
