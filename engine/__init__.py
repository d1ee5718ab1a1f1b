"""The engine of one model instance: scheduling, KV accounting, speculation and the model itself. It never imports Ray.

The modules directly in this package handle token ids, block numbers and clocks, and import no torch.
"""
