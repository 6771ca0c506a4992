"""Finding damage in a store, and mending it from the image's source.

Damage is found by digest, size and absence. What is mended is derived anew from the same image, by
determinism with the same digests, or it stays damaged: nothing here guesses, and nothing damaged is
ever taken over. The store is the owner of all state: quarantine markers and the scrub's position.
"""
