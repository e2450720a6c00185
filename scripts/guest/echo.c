/* Echoes what comes to port 7, by TCP (one process a connection) and by UDP. */
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"

static int bound(int type)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(7)};
	int fd = socket(AF_INET6, type, 0), yes = 1;

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) ||
	    bind(fd, (struct sockaddr *)&any, sizeof any)) {
		perror("echo-server");
		_exit(1);
	}
	return fd;
}

static void echo_stream(int fd)
{
	char data[65536], *at;
	ssize_t got, sent;

	while ((got = read(fd, data, sizeof data)) > 0)
		for (at = data; got > 0; at += sent, got -= sent)
			if ((sent = write(fd, at, got)) < 0)
				return;
}

static void echo_datagrams(int fd)
{
	char data[65536];
	struct sockaddr_in6 from;
	socklen_t length;
	ssize_t got;

	for (;;) {
		length = sizeof from;
		got = recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&from, &length);
		if (got >= 0)
			sendto(fd, data, got, 0, (struct sockaddr *)&from, length);
	}
}

int echo_main(void)
{
	int datagrams = bound(SOCK_DGRAM), listener = bound(SOCK_STREAM), fd;

	signal(SIGCHLD, SIG_IGN); /* no zombies */
	signal(SIGPIPE, SIG_IGN);
	if (listen(listener, 64))
		return 1;
	if (!fork())
		echo_datagrams(datagrams);
	for (;;) {
		fd = accept(listener, NULL, NULL);
		if (fd < 0)
			continue;
		if (!fork()) {
			echo_stream(fd);
			_exit(0);
		}
		close(fd);
	}
}
