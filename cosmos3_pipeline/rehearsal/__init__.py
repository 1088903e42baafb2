"""Running the real code on tensors that have shapes and no values, and counting what it would do on a device."""
