"""The tools: parsing, printing, exit codes; one module a tool."""
