@setlocal
@set "CARD=h200"
@set "VRAM=141GB"
@call "%~dp0launch.bat" %*
