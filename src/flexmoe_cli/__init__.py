"""The command line `flexmoe`."""
