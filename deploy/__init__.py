"""How Tandem is deployed: models, images and manifests."""
