"""Before a run starts: its cost, memory and speed, and checks of its parts. Nothing is trained."""
