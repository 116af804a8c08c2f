"""How the demo model was made: the world, its captions, and one training command per part."""
