"""What every room stands on: checks, types, errors, files, precision, integrators.

Nothing here knows of diffusion, and nothing here imports from another room.
"""
