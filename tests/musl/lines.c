/* An interpreter for scripts: runs the command in each line after the first, a path and arguments without quotes, until
** one fails. Its exit status is that one's. */
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void become(char *line) {
    char *words[32] = {0};
    int count = 0;
    for (char *word = strtok(line, " \n"); word && count < 31; word = strtok(NULL, " \n")) words[count++] = word;
    execv(words[0], words);
    perror(words[0]);
    _exit(126);
}

int main(int argc, char **argv) {
    char line[4096];
    FILE *script = argc > 1 ? fopen(argv[1], "r") : NULL;
    if (!script || !fgets(line, sizeof line, script)) return 2;
    while (fgets(line, sizeof line, script)) {
        int status;
        pid_t child = fork();
        if (child == 0) become(line);
        if (child < 0 || waitpid(child, &status, 0) != child) return 3;
        if (status) return WIFEXITED(status) ? WEXITSTATUS(status) : 4;
    }
    return 0;
}
