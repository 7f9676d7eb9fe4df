"""What a request may ask of a mesh, as a plain number: the API side reads it too. A model's card has the others."""

MIN_TARGET_FACES = 100
"""With fewer a solid keeps little of its form. Four, the fewest that enclose anything, were seen to be reached."""
