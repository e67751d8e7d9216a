"""What a cluster is told to run, and what checks it; docs/deployment.md says how to use it."""
