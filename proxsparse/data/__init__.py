"""From text of any origin to blocks of tokens."""
