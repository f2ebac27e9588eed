"""A package, as the folder of a script that runs would hide it behind the module of its name."""
