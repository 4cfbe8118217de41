"""The process that serves one domain: its control thread negotiates with clients and obeys the manager."""
