"""Ray: the only package that imports it."""

from distmtl.cluster.timeouts import set_timeouts

set_timeouts()  # before any module here imports ray
