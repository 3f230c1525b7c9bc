"""Pure functions on tensors and adapters: no devices, no config, no clients, no logging."""
