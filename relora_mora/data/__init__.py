"""From text to token blocks: exact, elastic, streaming. See docs/data.md."""
