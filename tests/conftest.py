"""Settings every test shares."""

from __future__ import annotations

from hypothesis import settings

# A first example may wait for the compiled extension to be built; no test may depend on the clock.
settings.register_profile("sparsebert", deadline=None, max_examples=25, print_blob=True)
settings.load_profile("sparsebert")
