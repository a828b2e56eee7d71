"""What people see: `live` follows a run, `tables` shows what a stage found, `units` writes numbers. No torch."""
