"""One module a DVC stage: `main()` does the I/O around one function of another room. No stage imports another."""
