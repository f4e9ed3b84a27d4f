"""What the course's Python environment adds to Jupyter. Installed by `cargo course setup`."""
