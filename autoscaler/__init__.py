"""One signal, two pools: the coordinated autoscaler."""
