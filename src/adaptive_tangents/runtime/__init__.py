"""What every wing stands on: memory that is free and the limit in force, files written whole or not at all."""
