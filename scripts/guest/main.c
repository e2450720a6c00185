#include <ctype.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

int64_t now_ns(int clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return ts.tv_sec * INT64_C(1000000000) + ts.tv_nsec;
}

void slurp(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t used = 0;
	ssize_t got = 0;

	while (fd >= 0 && used < size - 1 && (got = read(fd, text + used, size - 1 - used)) > 0)
		used += got;
	if (fd >= 0)
		close(fd);
	if (used && text[used - 1] == '\n')
		used--;
	text[used] = 0;
}

uint64_t cmdline_bytes(const char *word, uint64_t otherwise)
{
	char line[4096], *part, *rest = line, *end;
	size_t length = strlen(word);
	uint64_t value;

	slurp("/proc/cmdline", line, sizeof line);
	while ((part = strsep(&rest, " "))) {
		if (strncmp(part, word, length) || part[length] != '=')
			continue;
		value = strtoull(part + length + 1, &end, 10);
		switch (toupper((unsigned char)*end)) {
		case 'G':
			value <<= 10; /* fall through */
		case 'M':
			value <<= 10; /* fall through */
		case 'K':
			value <<= 10;
		}
		otherwise = value;
	}
	return otherwise;
}

int main(int argc, char **argv)
{
	const char *name = strrchr(argv[0], '/');

	(void)argc;
	name = name ? name + 1 : argv[0];
	if (!strcmp(name, "worker"))
		return worker_main();
	if (!strcmp(name, "echo-server"))
		return echo_main();
	if (!strcmp(name, "status"))
		return status_main();
	if (!strcmp(name, "index.cgi"))
		return index_main();
	fprintf(stderr, "call me worker, echo-server, status or index.cgi\n");
	return 2;
}
