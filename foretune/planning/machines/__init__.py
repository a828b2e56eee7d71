"""The machines: accelerators by name (`catalogue`), probed or described as a `Cluster` (`hardware`)."""
