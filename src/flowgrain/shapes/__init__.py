"""The shapes world: scenes of colored shapes, a grammar of prompts, a renderer, an exact oracle."""
