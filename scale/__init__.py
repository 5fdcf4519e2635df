"""The stages past one machine: runs in object storage, parts of answers, leases."""
