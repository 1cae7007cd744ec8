"""Remote storage: objects at an address, by name.

Knows addresses (`s3://`, `gs://`, `az://`, `memory://`, `file://`), obstore, which `store` alone imports, what its
errors mean, and who writes to an address. Imports nothing of the rest of `loop`; knows no checkpoints and no records.
"""
