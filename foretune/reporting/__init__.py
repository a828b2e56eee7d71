"""What people see: `live` follows a run, `tables` shows what a stage found, `page` is the HTML file,
`units` writes numbers. No torch."""
