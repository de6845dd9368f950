"""The recipes that ship with the framework: YAML files, found by name (`tubeworks recipe list`)."""
