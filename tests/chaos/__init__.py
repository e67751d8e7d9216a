"""Real deployments with processes killed or bytes damaged while requests run."""
