"""Which tokens of a row attend to which, and the kernels that compute it."""
