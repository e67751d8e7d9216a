"""Schemas that manifests are held against; README.md says where each comes from."""
