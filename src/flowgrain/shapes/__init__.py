"""The bundled world: scenes of coloured shapes, a grammar of prompts, a renderer and an exact oracle."""
