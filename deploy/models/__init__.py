"""The bundled model, its corpus and the generated bench model."""
